"""Plots and the page of block maps: `seer-jax plot`, and figures of the library."""

from seer_jax.plots.map_figure import plot_block_maps
from seer_jax.plots.maps import BlockMaps, block_maps, decode_block_maps, far_sighted_heads
from seer_jax.plots.page import write_page

__all__ = ["BlockMaps", "block_maps", "decode_block_maps", "far_sighted_heads", "plot_block_maps", "write_page"]
