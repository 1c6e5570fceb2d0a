"""Train a small Qwen3 language model on Python source text, with long-range recall woven into it.

The model is test material for sparse attention: small enough to keep beside the tests (8 million weights, 15 MiB in bf16), real
enough that dropping the wrong keys hurts. Hugging Face transformers builds and saves it.

    python train_tiny_lm.py tokenizer --work W --stdlib LIB --packages SITE...   learn the BPE, choose words, cut the evaluation text
    python train_tiny_lm.py corpus    --work W                                   gather and tokenise this interpreter's packages
    python train_tiny_lm.py probe     --work W                                   step times, and AdamW beside Muon for a moment
    python train_tiny_lm.py train     --work W --seconds 900                     train; stops and resumes at any time
    python train_tiny_lm.py deliver   --work W --to DIR                          save with transformers, evaluate in float32

Everything is kept in the folder W. Schedules (learning rate, context length) follow training time, not steps, so that a run fills
exactly the time it is given.
"""

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HELD_OUT = ("argparse.py", "asyncio", "email", "http", "logging", "unittest", "xml", "json")
EOT, PAD = "<|endoftext|>", "<|pad|>"
VOCAB = 4096
SEED = 20251

# Packages under permissive licences (PSF, BSD, MIT, Apache-2.0, HPND); weak-copyleft and proprietary ones are left out, and so is
# simplejson, which shares code with the held-out json package.
PERMISSIVE = """
PIL _pytest absl accelerate aiofiles aiohappyeyeballs aiohttp aiosignal anyio attr attrs botorch build charset_normalizer chex click
cloudpickle colorama contourpy coverage cupy cupyx cv2 cycler Cython dateutil diffrax e3nn einops equinox etils execnet filelock flax
fontTools formulaic frozenlist fsspec google gpytorch grpc h11 h5py httpcore httpx huggingface_hub humanize idna imageio iniconfig
jax jaxlib jaxtyping jinja2 joblib kiwisolver lazy_loader lightning lightning_fabric lightning_utilities linear_operator lineax
llvmlite lxml markdown markdown_it markupsafe matplotlib mdurl mesonbuild ml_dtypes mpl_toolkits mpmath msgpack multidict
multipledispatch nanobind narwhals networkx numba numba_cuda numpy numpyro onnx onnx_ir onnxruntime onnxscript opt_einsum
opt_einsum_fx optax optimistix orbax packaging pandas patsy peft pip pluggy portalocker prometheus_client propcache psutil pyarrow
pybind11 pydantic pygments pyparsing pyproject_hooks pytest_benchmark pytest_cov pytest_mock pytorch_lightning regex requests rich
sacrebleu safetensors scikit_build_core scipy seaborn sentence_transformers setuptools shellingham skimage sklearn sortedcontainers
statsmodels sympy tabulate tensorboard tensorstore threadpoolctl tifffile timm tlz tokenizers toolz torch torch_geometric torchaudio
torchdiffeq torchgen torchmetrics torchvision transformers treescope triton typer typing_extensions.py urllib3 wadler_lindig werkzeug
wheel wrapt xarray xdist xxhash yaml yarl zipp six.py
""".split()
PACKAGE_CAP = 32_000_000  # bytes taken from one package at most
STDLIB_COPIES = 3  # the evaluation text is standard library, so its kind counts three times


# ------------------------------------------------------------------------------------------------------------------ corpus


def is_held_out(path: Path, stdlib: Path) -> bool:
    return path.is_relative_to(stdlib) and path.relative_to(stdlib).parts[0] in HELD_OUT


def long_lines(text: str) -> list[str]:
    return [s for line in text.splitlines() if len(s := line.strip()) >= 40]


def readable(path: Path) -> str | None:
    """The text of a source file worth learning from, else None."""
    if not 300 <= path.stat().st_size <= 400_000:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    lines = text.splitlines()
    numeric = sum(text.count(d) for d in "0123456789")
    if max(map(len, lines)) > 1000 or len(text) / len(lines) > 90 or numeric > 0.25 * len(text) or "\0" in text:
        return None
    return text.replace(EOT, "").replace(PAD, "")


def gather(stdlib: Path, sites: list[Path], cap: float = PACKAGE_CAP) -> list[tuple[str, str, int]]:
    """(name, text, copies) of each training file, sorted by path; no held-out file and nothing that copies one."""
    held = {s for p in stdlib.rglob("*.py") if is_held_out(p, stdlib) for s in long_lines(p.read_text(errors="replace"))}
    seen: set[bytes] = set()
    out: list[tuple[str, str, int]] = []

    def take(path: Path, name: str, copies: int) -> int:
        text = readable(path)
        if text is None or (digest := hashlib.sha1(text.encode()).digest()) in seen:
            return 0
        lines = long_lines(text)
        if sum(s in held for s in lines) > max(8, 0.2 * len(lines)):
            return 0
        seen.add(digest)
        out.append((name, text, copies))
        return len(text)

    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if is_held_out(path, stdlib) or parts[0] in ("site-packages", "dist-packages"):
            continue
        if any(p.startswith("test_") and p[5:].removesuffix(".py") + x in HELD_OUT for p in parts for x in ("", ".py")):
            continue
        take(path, "/".join(("stdlib",) + parts), 1 if parts[0] in ("test", "idlelib", "lib2to3") else STDLIB_COPIES)
    for site in sites:
        for package in PERMISSIVE:
            root = site / package
            paths = [root] if root.is_file() else sorted(root.rglob("*.py")) if root.is_dir() else []
            size = sum(p.stat().st_size for p in paths)
            keep = cap / size if size > cap else 1.0
            for path in paths:
                name = str(path.relative_to(site))
                if int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 2**32 < keep:
                    take(path, name, 1)
    return out


def eval_text(stdlib: Path) -> str:
    """Every fourth held-out file in the order of their paths, up to 400 kB, each after an end-of-text mark."""
    files = sorted(p for p in stdlib.rglob("*.py") if is_held_out(p, stdlib) and p.stat().st_size > 1000)
    text = ""
    for piece in (EOT + p.read_text(encoding="utf-8") for p in files[2::4]):
        text += piece if len(text) + len(piece) <= 400_000 else ""
    return text


def make_tokenizer(files: list[tuple[str, str, int]]) -> Tokenizer:
    """Byte-level BPE with Qwen's splitting rule (each digit alone, newlines end a piece), learnt on about 50 MB of the corpus."""
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOT, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    packages = [t for n, t, _ in files if not n.startswith("stdlib")]
    share = min(1.0, 38e6 / max(1, sum(map(len, packages))))
    picked = [t for t in packages if int(hashlib.sha1(t.encode()).hexdigest()[:8], 16) / 2**32 < share]
    tokenizer.train_from_iterator([t for n, t, _ in files if n.startswith("stdlib")] + picked, trainer)
    return tokenizer


def make_words(files: list[tuple[str, str, int]]) -> dict[str, list[str]]:
    """Words to name secrets with; a tenth of them is kept for evaluation and never seen as a secret's name in training."""
    counts: dict[str, int] = {}
    for _, text, _ in files:
        for word in set(re.findall(r"(?<![A-Za-z])[a-z]{3,9}(?![a-z])", text)):
            counts[word] = counts.get(word, 0) + 1
    words = sorted(w for w, n in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:12_000])
    rng = np.random.default_rng(SEED)
    held = set(rng.choice(len(words), len(words) // 10, replace=False).tolist())
    return {"train": [w for i, w in enumerate(words) if i not in held], "eval": [words[i] for i in sorted(held)]}


def command_tokenizer(a) -> None:
    work, stdlib = Path(a.work), Path(a.stdlib)
    work.mkdir(parents=True, exist_ok=True)
    files = gather(stdlib, [Path(p) for p in a.packages])
    tokenizer = make_tokenizer(files)
    tokenizer.save(str(work / "tokenizer.json"))
    (work / "words.json").write_text(json.dumps(make_words(files)))
    text = eval_text(stdlib)
    (work / "eval_text.txt").write_text(text, encoding="utf-8")
    n = len(tokenizer.encode(text, add_special_tokens=False).ids)
    print(f"{len(files)} files, {sum(len(t) for _, t, _ in files) / 1e6:.0f} MB; evaluation text {len(text)} bytes, {n} tokens")


_tokenizer: Tokenizer | None = None


def _tokenise(job: tuple[str, list[str]]) -> bytes:
    global _tokenizer
    path, texts = job
    if _tokenizer is None:
        _tokenizer = Tokenizer.from_file(path)
    eot = _tokenizer.token_to_id(EOT)
    return b"".join(np.array([eot] + _tokenizer.encode(t, add_special_tokens=False).ids, np.uint16).tobytes() for t in texts)


def command_corpus(a) -> None:
    """tokens.bin: uint16, one end-of-text token before each file, related files side by side."""
    work, start = Path(a.work), time.time()
    stdlib = Path(a.stdlib or sysconfig.get_paths()["stdlib"])
    sites = [Path(p) for p in a.packages or [sysconfig.get_paths()["purelib"]]]
    files = gather(stdlib, sites, a.cap)
    size: dict[str, int] = {}
    for name, text, _ in files:
        size[name.split("/")[0]] = size.get(name.split("/")[0], 0) + len(text)
    print(f"gathered {len(files)} files, {sum(size.values()) / 1e6:.1f} MB in {time.time() - start:.0f} s", flush=True)
    print(" ".join(f"{k}={v / 1e6:.1f}" for k, v in sorted(size.items(), key=lambda kv: -kv[1])[:60]), flush=True)
    path = str(work / "tokenizer.json")
    jobs, chunk, filled = [], [], 0
    for _, text, _ in files:
        chunk.append(text)
        filled += len(text)
        if filled > 400_000:
            jobs, chunk, filled = jobs + [chunk], [], 0
    jobs.append(chunk)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        parts = pool.map(_tokenise, [(path, c) for c in jobs], chunksize=2)
    tokens = np.frombuffer(b"".join(parts), np.uint16)
    copies = np.array([c for _, _, c in files])
    starts = np.append(np.flatnonzero(tokens == 0), len(tokens))
    assert len(starts) == len(files) + 1, (len(starts), len(files))
    again = [tokens[starts[i] : starts[i + 1]] for i in np.flatnonzero(copies > 1)]
    stream = np.concatenate([tokens] + again * (STDLIB_COPIES - 1))
    stream.tofile(work / "tokens.tmp")
    meta = dict(files=len(files), bytes=sum(size.values()), tokens=len(tokens), stream=len(stream), megabytes=size)
    meta["megabytes"] = {k: round(v / 1e6, 2) for k, v in sorted(size.items(), key=lambda kv: -kv[1])}
    (work / "corpus.json").write_text(json.dumps(meta, indent=1))
    (work / "tokens.tmp").rename(work / "tokens.bin")
    print(f"{len(tokens) / 1e6:.1f}M tokens, stream {len(stream) / 1e6:.1f}M, {time.time() - start:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------------------------ recall

TEXT, SECRET, ANSWER = 0, 1, 2  # what a token is, for the loss
LOSS_WEIGHT = (1.0, 0.1, 4.0)  # random digits cannot be foretold where they first appear; answers matter most


def secret_name(rng: np.random.Generator, words: list[str]) -> str:
    pick = lambda: words[rng.integers(len(words))]
    return pick() if rng.random() < 0.4 else f"{pick()}_{pick()}"


def digits(rng: np.random.Generator, n: int) -> str:
    return "".join(map(str, rng.integers(0, 10, n)))


def passkey_lines(name: str, value: str) -> tuple[str, str]:
    return f"# The pass key of {name} is {value}.\n", f"# What is the pass key of {name}? It is {value}.\n"


def recall_lines(rng: np.random.Generator, words: list[str]) -> tuple[str, list[str]]:
    """Text that states one or more secrets, and the lines that may ask for them."""
    kind = rng.random()
    if kind < 0.65:
        stated, asked = passkey_lines(secret_name(rng, words), digits(rng, 5))
        return stated, [asked]
    if kind < 0.82:
        name, value = secret_name(rng, words), str(rng.integers(10 ** rng.integers(2, 6)))
        if rng.random() < 0.5:
            name = name.upper()
        return f"{name} = {value}\n", [f"assert {name} == {value}\n"]
    table, keys = secret_name(rng, words), [secret_name(rng, words) for _ in range(rng.integers(2, 9))]
    rows = {k: digits(rng, int(rng.integers(2, 6))) for k in keys}
    body = "".join(f'    "{k}": {v},\n' for k, v in rows.items())
    return f"{table} = {{\n{body}}}\n", [f'assert {table}["{k}"] == {v}\n' for k, v in rows.items()]


class Sampler:
    """Draws training sequences: windows of the corpus, two in five with secrets stated and asked for again at random places."""

    def __init__(self, work: Path, share: float = 0.4):
        self.stream = np.memmap(work / "tokens.bin", np.uint16, "r")
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        self.words = json.loads((work / "words.json").read_text())["train"]
        self.share = share
        self.ends_line, self.is_digit = token_kinds(self.tokenizer)

    def sequence(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        start = int(rng.integers(0, len(self.stream) - n))
        base = np.asarray(self.stream[start : start + n])
        if rng.random() >= self.share:
            return base, np.zeros(n, np.uint8)
        places = np.flatnonzero(self.ends_line[base]) + 1
        budget = int(n * rng.uniform(0.04, 0.22)) + 64
        lines: list[tuple[float, int, str]] = []  # where (0..1), what, text
        used = 0
        while used < budget:
            stated, asked = recall_lines(rng, self.words)
            at = rng.random() * 0.98
            lines.append((at, SECRET, stated))
            used += len(stated) // 3 + 6
            for line in (asked[i] for i in rng.choice(len(asked), min(len(asked), 4), replace=False)):
                for _ in range(int(rng.integers(1, 3))):
                    far = rng.random()  # half of the questions anywhere later, some soon, some at the very end
                    later = at + (1 - at) * (rng.random() if far < 0.6 else rng.random() ** 4 if far < 0.85 else 0.97 + 0.03 * rng.random())
                    lines.append((later, ANSWER, line))
                    used += len(line) // 3 + 6
        lines.sort(key=lambda x: x[0])
        codes = [e.ids for e in self.tokenizer.encode_batch([t for _, _, t in lines], add_special_tokens=False)]
        rest = n - sum(map(len, codes))
        places = places[places < rest]
        if rest <= 0 or not len(places):
            return base, np.zeros(n, np.uint8)
        where = places[np.minimum((np.array([w for w, _, _ in lines]) * len(places)).astype(int), len(places) - 1)]
        tokens, kinds, last = [], [], 0
        for (_, what, _), ids, at in zip(lines, codes, where):
            ids = np.array(ids, np.uint16)
            tokens += [base[last:at], ids]
            kinds += [np.zeros(at - last, np.uint8), np.where(self.is_digit[ids], what, TEXT).astype(np.uint8)]
            last = at
        tokens.append(base[last:rest])
        kinds.append(np.zeros(rest - last, np.uint8))
        return np.concatenate(tokens), np.concatenate(kinds)

    def batch(self, rng: np.random.Generator, rows: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = [self.sequence(rng, n) for _ in range(rows)]
        return np.stack([t for t, _ in drawn]).astype(np.int32), np.stack([k for _, k in drawn])


def token_kinds(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """For each token: does it end a line; is it one digit."""
    text = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())]
    return np.array([t.endswith("\n") for t in text]), np.array([len(t) == 1 and t in "0123456789" for t in text])


@functools.cache
def eval_tokens(work: Path) -> tuple[Tokenizer, np.ndarray]:
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    text = (work / "eval_text.txt").read_text(encoding="utf-8")
    return tokenizer, np.array(tokenizer.encode(text, add_special_tokens=False).ids)


@functools.cache
def passkey_prompts(work: Path, n: int, count: int, seed: int, others: int = 0) -> list[dict]:
    """Prompts of n - 5 tokens whose continuation is the five digits: evaluation text with one line that states the pass key.

    The line stands at depth 0.1, 0.2 .. 0.9 of the text before the question, in turn. `others` more pass keys, of other names, stand
    at random depths: distractors.
    """
    tokenizer, text = eval_tokens(work)
    words = json.loads((work / "words.json").read_text())["eval"]
    ends_line, is_digit = token_kinds(tokenizer)
    lines = np.flatnonzero(ends_line[text]) + 1
    rng = np.random.default_rng((seed, n, others))
    prompts = []
    for i in range(count):
        names: list[str] = []
        while len(names) < 1 + others:
            if (name := secret_name(rng, words)) not in names:
                names.append(name)
        values = [digits(rng, 5) for _ in names]
        depths = [0.1 + 0.1 * (i % 9)] + rng.random(others).tolist()
        stated = [np.array(tokenizer.encode(passkey_lines(a, b)[0], add_special_tokens=False).ids) for a, b in zip(names, values)]
        asked = np.array(tokenizer.encode(passkey_lines(names[0], values[0])[1], add_special_tokens=False).ids)
        first = np.flatnonzero(is_digit[asked])[0]
        question, answer = asked[:first], asked[first : first + 5]
        room = n - 5 - len(question) - sum(map(len, stated))
        begin = int(rng.choice(lines[lines < len(text) - room - 1]))
        filler = text[begin : begin + room]
        places = np.flatnonzero(ends_line[filler[:-1]]) + 1
        pieces = [(int(places[np.argmin(abs(places - d * room))]), s) for d, s in zip(depths, stated)]
        out, last = [], 0
        for at, ids in sorted(pieces, key=lambda p: p[0]):
            out += [filler[last:at], ids]
            last = at
        # the text may stop in the middle of a line: the question starts a line of its own all the same
        out += [filler[last:-1], np.array([tokenizer.token_to_id("Ċ")]), question]
        prompt = np.concatenate(out)
        assert len(prompt) == n - 5, (len(prompt), n)
        prompts.append(
            dict(name=names[0], answer=values[0], depth=round(depths[0], 2), input_ids=prompt.tolist(), answer_ids=answer.tolist())
        )
    return prompts


# ------------------------------------------------------------------------------------------------------------------- model


def build_model(layers: int = 8):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # what is added to the residual stream starts small
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
    return model


class Trained:
    """The transformers model run layer by layer with one compiled block, so that compiling costs one layer rather than eight."""

    def __init__(self, model, compiled: bool):
        import torch
        import torch.nn.functional as F

        def block(layer, h, cos, sin):
            return layer.forward(h, attention_mask=None, position_embeddings=(cos, sin))

        def head(h, norm, embedding, targets, kinds, weights):
            nll = F.cross_entropy(F.linear(norm(h), embedding).float(), targets, reduction="none")
            w = weights[kinds]
            parts = torch.stack([(nll * (kinds == k)).sum() for k in (TEXT, SECRET, ANSWER)])
            counts = torch.stack([(kinds == k).sum() for k in (TEXT, SECRET, ANSWER)])
            return (nll * w).sum() / w.sum(), parts.detach(), counts

        self.model = model
        self.block = torch.compile(block, dynamic=False) if compiled else block
        self.head = torch.compile(head, dynamic=False) if compiled else head
        self.weights = torch.tensor(LOSS_WEIGHT, device=model.device)

    def loss(self, tokens, kinds, positions=None):
        """(weighted mean loss, summed loss of each kind of token, number of each kind)."""
        import torch

        core = self.model.model
        inputs, targets, kinds = tokens[:, :-1], tokens[:, 1:], kinds[:, 1:].reshape(-1).long()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
            if positions is None:
                positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
            h = core.embed_tokens(inputs)
            cos, sin = core.rotary_emb(h, positions)  # h is float32 here, so the angles are
            h = h.bfloat16() if h.is_cuda else h
            for layer in core.layers:
                h = self.block(layer, h, cos, sin)
            return self.head(h.flatten(0, 1), core.norm, core.embed_tokens.weight, targets.reshape(-1), kinds, self.weights)


def grown(weights: dict, optimizer: dict, layers: int) -> tuple[dict, dict]:
    """The same function with twice the layers: each is followed by a copy that adds nothing yet (its output matrices are zero)."""
    place = re.compile(r"(model\.layers\.)(\d+)(\..+)")
    out, kept = {}, {}
    for name, w in weights.items():
        if m := place.fullmatch(name):
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            out[f"{m[1]}{2 * int(m[2])}{m[3]}"] = w
            out[f"{m[1]}{2 * int(m[2]) + 1}{m[3]}"] = w * 0 if silent else w.clone()
        else:
            out[name] = w
    for name, s in optimizer.items():
        kept[f"{m[1]}{2 * int(m[2])}{m[3]}" if (m := place.fullmatch(name)) else name] = s
    assert len({n.split(".")[2] for n in out if place.fullmatch(n)}) == layers, "layers can only be doubled"
    return out, kept


class Muon:
    """Momentum made orthogonal, for the matrices between embeddings (Jordan 2024; step size as AdamW's, Liu et al. 2025).

    Matrices of one shape are stacked and handled together.
    """

    def __init__(self, params, decay: float, momentum: float = 0.95):
        import torch

        groups: dict = {}
        for p in params:
            groups.setdefault(tuple(p.shape), []).append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros((len(g), *g[0].shape), device=g[0].device) for g in self.groups]
        self.decay, self.momentum = decay, momentum

    def step(self, lr: float) -> None:
        import torch

        for group, buffer in zip(self.groups, self.buffers):
            grad = torch.stack([p.grad for p in group])
            buffer.lerp_(grad, 1 - self.momentum)
            x = grad.lerp(buffer, self.momentum)
            x = x.bfloat16() if x.is_cuda else x
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)
            for a, b, c in ((3.4445, -4.7750, 2.0315),) * 5:
                y = x @ x.mT
                x = a * x + (b * y + c * y @ y) @ x
            x = (x.mT if tall else x).float() * (0.2 * math.sqrt(max(x.shape[1:])))
            torch._foreach_mul_(group, 1 - lr * self.decay)
            torch._foreach_add_(group, list(x.unbind(0)), alpha=-lr)


class Optimizers:
    """AdamW throughout, or Muon for the matrices and AdamW for embeddings and norms."""

    def __init__(self, model, kind: str, decay: float = 0.1):
        import torch

        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in named if not (p.ndim == 2 and "embed" not in n)]
        self.params = matrices + others
        self.names = {p: n for n, p in named}
        self.muon = Muon(matrices, decay) if kind == "muon" else None
        groups = [dict(params=others, weight_decay=0.0)]
        if not self.muon:
            groups.append(dict(params=matrices, weight_decay=decay))
        self.adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-10, fused=model.device.type == "cuda")

    def step(self, lr: float):
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        if self.muon:
            with torch.no_grad():
                self.muon.step(lr)
        for p in self.params:
            p.grad = None
        return norm

    def state(self) -> dict[str, dict]:
        """What to keep of each parameter, by name."""
        kept = {self.names[p]: dict(s) for p, s in self.adam.state.items()}
        for group, buffer in zip(self.muon.groups, self.muon.buffers) if self.muon else ():
            kept |= {self.names[p]: dict(momentum=b.clone()) for p, b in zip(group, buffer)}
        return kept

    def load(self, state: dict[str, dict]) -> None:
        for p, name in self.names.items():
            if name in state and "momentum" not in state[name]:
                self.adam.state[p] = {k: v.clone() for k, v in state[name].items()}
        for group, buffer in zip(self.muon.groups, self.muon.buffers) if self.muon else ():
            for p, b in zip(group, buffer):
                if self.names[p] in state:
                    b.copy_(state[self.names[p]]["momentum"])


# ---------------------------------------------------------------------------------------------------------------- training


def loader(work: Path, length: int, rows: int, share: float, seed, workers: int):
    """Batches (tokens [rows, length + 1], kinds) without end, drawn in other processes."""
    import torch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            info = torch.utils.data.get_worker_info()
            if info:
                torch.set_num_threads(1)
            rng = np.random.default_rng((*seed, length, info.id if info else 0))
            sampler = Sampler(work, share)
            while True:
                tokens, kinds = sampler.batch(rng, rows, length + 1)
                yield torch.from_numpy(tokens), torch.from_numpy(kinds)

    cuda = torch.cuda.is_available()
    options = dict(num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=cuda)
    return iter(torch.utils.data.DataLoader(Stream(), batch_size=None, **options))


def quick_eval(model, work: Path, length: int, windows: int, prompts: int) -> dict:
    """Held-out loss and pass key accuracy as the model stands, in bf16 autocast."""
    import torch

    _, text = eval_tokens(work)
    windows = min(windows, len(text) // length)
    rows = torch.from_numpy(text[: windows * length]).view(windows, length).to(model.device)
    step = max(1, 65536 // length)
    nll, out = 0.0, {}
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        for part in rows.split(step):
            logits = model(part, use_cache=False).logits[:, :-1].float()
            nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        out["nll"] = round(nll / (windows * (length - 1)), 4)
        for others in (0, 4):
            asked = passkey_prompts(work, length, prompts, SEED + 1, others)
            ids = torch.tensor([p["input_ids"] + p["answer_ids"] for p in asked]).to(model.device)
            right = []
            for part in ids.split(step):
                best = model(part, use_cache=False, logits_to_keep=6).logits[:, :-1].argmax(-1)
                right.append(best == part[:, -5:])
            right = torch.cat(right)
            out[f"passkey+{others}"] = round(right.all(1).float().mean().item(), 3)
            out[f"digits+{others}"] = round(right.float().mean().item(), 3)
    return out


class Phase(NamedTuple):
    """A part of training: until this share of the time, windows of `length` tokens, `batch` tokens a step, `share` of them with
    secrets; in half of the rows, positions jump ahead at random so that they reach up to `stretch` (0: never)."""

    until: float
    length: int
    batch: int
    share: float
    stretch: int = 0


def parse_phases(text: str) -> list[Phase]:
    rows = [p.split(":") for p in text.split(",")]
    return [Phase(float(r[0]), int(r[1]), int(r[2]), float(r[3]), *map(int, r[4:])) for r in rows]


def jumping_positions(rows: int, length: int, stretch: int, generator):
    """Positions [rows, length] that leave gaps: a short window then teaches distances up to `stretch` (Zhu et al. 2023)."""
    import torch

    steps = torch.ones(rows, length, dtype=torch.long)
    steps[:, 0] = 0
    for row in range(rows):
        if stretch > length and torch.rand((), generator=generator) < 0.5:
            jumps = int(torch.randint(1, 5, (), generator=generator))
            at = torch.randint(1, length, (jumps,), generator=generator)
            shares = torch.rand(jumps + 1, generator=generator)
            gaps = (shares / shares.sum())[:jumps] * (stretch - length)
            steps[row].index_add_(0, at, gaps.long())
    return steps.cumsum(1)


def schedule(progress: float, peak: float) -> float:
    """Warm up over the first 2% of the time, then half a cosine down to 1%."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98))))


def phase_at(progress: float, phases: list[Phase]) -> Phase:
    return next((p for p in phases if progress < p.until), phases[-1])


def write_weights(model, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, str(path) + ".tmp")
    os.replace(str(path) + ".tmp", path)


def choose_attention(name: str) -> None:
    import torch

    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")


def command_train(a) -> None:
    import torch

    born = time.time()
    torch.set_float32_matmul_precision("high")
    choose_attention(a.attention)
    work, out = Path(a.work), Path(a.out or a.work)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    phases = parse_phases(a.phases)
    model = build_model(a.layers).to(device)
    trained = Trained(model, compiled=not a.eager)
    optimizers = Optimizers(model, a.optimizer)
    state = dict(layers=a.layers, seconds=0.0, step=0, tokens=0, runs=0, curve=[], evals=[], phase_tokens={})
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists() and not a.fresh:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        state = saved["state"]
        if state["layers"] != a.layers:
            saved["model"], saved["optimizers"] = grown(saved["model"], saved["optimizers"], a.layers)
            state["layers"], state["grown_at"] = a.layers, [state["seconds"], state["step"], state["tokens"]]
            print(f"grown to {a.layers} layers", flush=True)
        model.load_state_dict(saved["model"])
        optimizers.load(saved["optimizers"])
    elif a.weights:
        from safetensors.torch import load_file

        model.load_state_dict({k: v.float() for k, v in load_file(a.weights).items()}, strict=False)
        state = json.loads(Path(a.state).read_text())
    state["runs"] += 1
    print(f"start at {state['seconds']:.0f} s, step {state['step']}, {state['tokens'] / 1e6:.0f}M tokens", flush=True)

    def save() -> None:
        saved = dict(model=model.state_dict(), optimizers=optimizers.state(), state=state)
        torch.save(saved, work / "checkpoint.tmp")
        os.replace(work / "checkpoint.tmp", checkpoint)
        for folder in dict.fromkeys((work, out)):
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(model, folder / "weights.safetensors")
            (folder / "state.json").write_text(json.dumps(state))

    def evaluate() -> None:
        result = quick_eval(model, work, length, windows=max(2, a.eval_tokens // length), prompts=a.prompts)
        state["evals"].append(dict(seconds=round(state["seconds"], 1), tokens=state["tokens"], length=length, **result))
        print("   ", json.dumps(state["evals"][-1]), flush=True)

    length, phase, batches, mark = 0, None, None, time.time()
    generator = torch.Generator().manual_seed(SEED + state["runs"])
    next_eval, next_save, next_line = state["seconds"] + a.eval_every, state["seconds"] + a.save_every, state["seconds"] + 5
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    counts = torch.zeros(3, device=device, dtype=torch.int64)
    lined = (state["seconds"], state["tokens"])
    while state["seconds"] < a.seconds and time.time() - born < a.stop_after:
        progress = state["seconds"] / a.seconds
        fresh = phase_at(progress, phases) != phase
        if fresh:
            phase, batches = phase_at(progress, phases), None
            length = phase.length
            batches = loader(work, length, phase.batch // length, phase.share, (SEED, state["runs"], state["step"]), a.workers)
            print(f"  {phase}", flush=True)
        tokens, kinds = (x.to(device, non_blocking=True) for x in next(batches))
        lr = schedule(progress, a.lr)
        positions = jumping_positions(len(tokens), length, phase.stretch, generator).to(device) if phase.stretch else None
        loss, parts, number = trained.loss(tokens.long(), kinds, positions)
        loss.backward()
        norm = optimizers.step(lr)
        sums += parts
        counts += number
        state["step"] += 1
        state["tokens"] += phase.batch
        state["phase_tokens"][str(length)] = state["phase_tokens"].get(str(length), 0) + phase.batch
        if device == "cuda" and (fresh or state["step"] % 4 == 0):
            torch.cuda.synchronize()
        now = time.time()
        if not fresh:  # the first step of a shape compiles; that is not training time
            state["seconds"] += now - mark
        mark = now
        if state["seconds"] >= next_line:
            per = (sums / counts.clamp(min=1)).tolist()
            rate = (state["tokens"] - lined[1]) / (state["seconds"] - lined[0])
            lined = (state["seconds"], state["tokens"])
            row = [round(state["seconds"], 1), state["step"], state["tokens"], length, round(lr, 6)]
            row += [round(x, 4) for x in (per[TEXT], per[ANSWER])]
            state["curve"].append(row)
            print(f"{row[0]:7.1f}s step {row[1]} {row[2] / 1e6:.0f}M lr {lr:.5f} text {per[TEXT]:.4f} answer {per[ANSWER]:.4f} "
                  f"norm {norm.item():.2f} {rate / 1e6:.2f}M tok/s", flush=True)  # fmt: skip
            sums.zero_()
            counts.zero_()
            next_line = state["seconds"] + a.line_every
        if state["seconds"] >= next_eval:
            evaluate()
            next_eval = state["seconds"] + a.eval_every
            mark = time.time()  # evaluation is not counted as training time
        if state["seconds"] >= next_save:
            save()
            next_save = state["seconds"] + a.save_every
            mark = time.time()
    if length:
        evaluate()
        save()
    print(f"stop at {state['seconds']:.0f} s, step {state['step']}, {state['tokens'] / 1e6:.0f}M tokens", flush=True)


def command_probe(a) -> None:
    """Which attention backend is faster, how long a step takes at each context length, which optimizer learns faster at first."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [int(n) for n in a.lengths.split(",")]
    work, born = Path(a.work), time.time()

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(f, n):
        f()
        f()
        wait()
        start = time.time()
        for _ in range(n):
            f()
        wait()
        return (time.time() - start) / n

    best = {}
    for length in lengths if device == "cuda" else []:
        rows = a.batch // length
        shape = lambda h: torch.randn(rows, length, h, 64, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        q, k, v = shape(8), shape(2), shape(2)
        g, grads = torch.randn_like(q), []
        for name in a.backends.split(","):
            backend = SDPBackend.FLASH_ATTENTION if name == "flash" else SDPBackend.CUDNN_ATTENTION
            try:
                with sdpa_kernel(backend):
                    ahead = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 5)
                    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    back = timed(lambda: torch.autograd.grad(o, (q, k, v), g, retain_graph=True), 5)
                    grads.append([o.detach(), *torch.autograd.grad(o, (q, k, v), g)])
                flop = 2 * rows * 8 * length**2 * 64
                print(f"attention {length} {name}: forward {ahead * 1e3:.2f} ms ({flop / ahead / 1e12:.0f} TF), "
                      f"backward {back * 1e3:.2f} ms ({2.5 * flop / back / 1e12:.0f} TF)", flush=True)  # fmt: skip
                best[name] = ahead + back
            except RuntimeError as error:
                print(f"attention {length} {name}: {str(error).splitlines()[0][:100]}", flush=True)
        if len(grads) == 2:
            differ = [((x - y).float().norm() / x.float().norm()).item() for x, y in zip(*grads)]
            print("  cudnn against flash:", " ".join(f"{d:.4f}" for d in differ), flush=True)
            if max(differ) > 0.02:
                best["cudnn"] = 1e9
        del q, k, v, g, grads
    if best:
        a.attention = min(best, key=best.get)
        choose_attention(a.attention)
        print("attention:", a.attention, flush=True)
    model = build_model().to(device)
    begin = {k: v.clone() for k, v in model.state_dict().items()}
    trained, optimizers = Trained(model, not a.eager), Optimizers(model, "muon")
    for length in lengths:
        tokens = torch.randint(0, VOCAB, (a.batch // length, length + 1), device=device)
        kinds = torch.randint(0, 3, tokens.shape, device=device)

        def step():
            trained.loss(tokens, kinds)[0].backward()
            optimizers.step(1e-5)

        start = time.time()
        step()
        wait()
        first = time.time() - start
        each = timed(step, 5)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0
        print(f"{time.time() - born:.0f} s: step {length} x {a.batch // length}: first {first:.1f} s, then {each * 1e3:.1f} ms, "
              f"{a.batch / each / 1e6:.2f}M tok/s, peak {peak:.1f} GiB", flush=True)  # fmt: skip
    while not (work / "tokens.bin").exists():
        time.sleep(0.2)
    length = lengths[0]
    for kind, lr in (x.split(":") for x in a.compare.split(",")):
        model.load_state_dict(begin)
        optimizers = Optimizers(model, kind)
        batches = loader(work, length, a.batch // length, 0.4, (SEED, 0), a.workers)
        start, mark, steps, sums, counts = None, 0, 0, torch.zeros(3, device=device), torch.zeros(3, device=device)
        while start is None or (progress := (time.time() - start) / a.compare_seconds) < 1:
            tokens, kinds = (x.to(device, non_blocking=True) for x in next(batches))
            start = start or time.time()
            loss, parts, number = trained.loss(tokens.long(), kinds)
            loss.backward()
            optimizers.step(schedule((time.time() - start) / a.compare_seconds, float(lr)))
            steps += 1
            wait()
            if time.time() - start > 0.9 * a.compare_seconds:
                sums, counts = sums + parts, counts + number
        per = (sums / counts.clamp(min=1)).tolist()
        result = quick_eval(model, work, length, 64, 36)
        print(f"{time.time() - born:.0f} s: {kind} {lr}: {steps} steps, text {per[0]:.4f}, answer {per[2]:.4f}, {result}", flush=True)
        del batches


# ---------------------------------------------------------------------------------------------------------------- delivery


def sink_and_window(n: int, sink: int, window: int):
    """Mask [1, 1, n, n], True = attend: the first `sink` tokens and the last `window` tokens, the row's own included."""
    import torch

    i = torch.arange(n)
    near = i[:, None] - i[None, :]
    return ((near >= 0) & ((near < window) | (i[None, :] < sink)))[None, None]


def perplexity(model, text, length: int, mask=None) -> dict:
    """Windows of `length` tokens, one after the other from the first token on; the first token of a window is not scored."""
    import torch

    windows = len(text) // length
    rows = torch.as_tensor(text[: windows * length]).view(windows, length).to(model.device)
    nll = []
    with torch.no_grad():
        for row in rows:
            logits = model(row[None], attention_mask=mask, use_cache=False).logits[0, :-1].float()
            nll.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").double())
    nll = torch.cat(nll)
    return dict(length=length, windows=windows, scored_tokens=len(nll), mean_nll=nll.mean().item(), perplexity=nll.mean().exp().item())


def passkey_accuracy(model, prompts: list[dict], mask=None) -> dict:
    """Greedy decoding finds all five digits exactly if each is the likeliest given the right ones before it: one pass tells."""
    import torch

    by_depth: dict = {}
    for p in prompts:
        ids = torch.tensor([p["input_ids"] + p["answer_ids"]]).to(model.device)
        with torch.no_grad():
            best = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=6).logits[0, :-1].argmax(-1)
        by_depth.setdefault(str(p["depth"]), []).append((best == ids[0, -5:]).tolist())
    flat = [row for rows in by_depth.values() for row in rows]
    return dict(
        prompts=len(flat),
        exact=sum(map(all, flat)) / len(flat),
        digits=sum(map(sum, flat)) / (5 * len(flat)),
        exact_by_depth={d: sum(map(all, rows)) / len(rows) for d, rows in by_depth.items()},
    )


def command_deliver(a) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    work, to = Path(a.work), Path(a.to)
    to.mkdir(parents=True, exist_ok=True)
    state = json.loads((work / "state.json").read_text())
    model = build_model(state["layers"])
    missing = model.load_state_dict({k: v.float() for k, v in load_file(work / "weights.safetensors").items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys, missing
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(to)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), bos_token=EOT, eos_token=EOT, pad_token=PAD, model_max_length=16384,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(to)
    (to / "eval_text.txt").write_bytes((work / "eval_text.txt").read_bytes())

    model = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    _, text = eval_tokens(work)
    prompts = passkey_prompts(work, 4096, 50, SEED + 2)
    with open(to / "passkey_4096.jsonl", "w") as f:
        for p in prompts:
            f.write(json.dumps(p) + "\n")
    ids = torch.from_numpy(text[:512])[None]
    where = torch.arange(31, 512, 32)
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits[0, where].cpu()
    save_file(
        dict(input_ids=ids, positions=where, logits=logits.contiguous()), to / "logits_check.safetensors",
        metadata=dict(note="logits [16, vocab] in float32 at `positions` of input_ids, the first 512 tokens of eval_text.txt"),
    )  # fmt: skip
    reference = dict(
        perplexity=dict(
            definition="eval_text.txt is tokenised as one text without added tokens (the end-of-text marks in it become token 0). "
            "Windows of `length` tokens follow one another from token 0 on; a last, shorter one is dropped. Positions 1 .. length-1 "
            "of each window are scored given all earlier positions of that window; perplexity = exp(mean negative log likelihood). "
            "float32 weights (the saved bf16 values) and arithmetic, sdpa attention.",
            tokens=len(text),
            first_tokens=text[:16].tolist(),
            dense=[],
            sink64_window512=[],
        ),
        passkey=dict(
            definition="length = prompt + 5 answer digits; evaluation text with one line stating the pass key at depth 0.1 .. 0.9 and "
            "a question as last line; `distractors` more pass keys of other names at random depths. exact: all five digits by greedy "
            "decoding, float32.",
            dense=[],
            sink64_window512=[],
        ),
        sink64_window512="a query sees the first 64 tokens and the last 512 (itself among them), in every layer",
        training={k: state[k] for k in ("seconds", "step", "tokens", "phase_tokens")},
        curve=dict(columns=["seconds", "step", "tokens", "context", "lr", "text_nll", "answer_digit_nll"], rows=state["curve"][::2]),
        evaluations=state["evals"],
    )
    if (work / "corpus.json").exists():
        reference["training"]["corpus"] = json.loads((work / "corpus.json").read_text())

    def note(kind, attention, row):
        reference[kind][attention].append(row)
        (to / "reference.json").write_text(json.dumps(reference, indent=1))
        print(kind, attention, json.dumps(row), flush=True)

    mask = sink_and_window(4096, 64, 512).to(model.device)
    for length in (1024, 4096, 8192):
        note("perplexity", "dense", perplexity(model, text, length))
    note("perplexity", "sink64_window512", perplexity(model, text, 4096, mask))
    note("passkey", "dense", dict(length=4096, distractors=0, file="passkey_4096.jsonl", **passkey_accuracy(model, prompts)))
    note("passkey", "sink64_window512", dict(length=4096, distractors=0, file="passkey_4096.jsonl", **passkey_accuracy(model, prompts, mask)))
    for length, count in ((1024, 90), (2048, 90), (4096, 90), (8192, 45)):
        for others in (0, 4):
            row = passkey_accuracy(model, passkey_prompts(work, length, count, SEED + 3, others))
            note("passkey", "dense", dict(length=length, distractors=others, **row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("tokenizer", "corpus", "probe", "train", "deliver"):
        sub = commands.add_parser(name)
        sub.add_argument("--work", required=True)
        if name in ("tokenizer", "corpus"):
            sub.add_argument("--stdlib", default=None)
            sub.add_argument("--packages", nargs="*", default=[])
            sub.add_argument("--cap", type=float, default=PACKAGE_CAP, help="bytes taken from one package at most")
        if name in ("probe", "train"):
            sub.add_argument("--eager", action="store_true")
            sub.add_argument("--attention", choices=("flash", "cudnn"), default="flash")
        if name == "probe":
            sub.add_argument("--lengths", default="1024,4096,8192")
            sub.add_argument("--batch", type=int, default=262_144)
            sub.add_argument("--backends", default="flash,cudnn")
            sub.add_argument("--compare", default="adamw:3e-3,muon:3e-3,muon:6e-3")
            sub.add_argument("--compare-seconds", type=float, default=8)
            sub.add_argument("--workers", type=int, default=8)
        if name == "train":
            sub.add_argument("--out", default=None, help="where weights and state are also written")
            sub.add_argument("--seconds", type=float, required=True, help="training time in all")
            sub.add_argument("--stop-after", type=float, default=1e9, help="leave this run after so many seconds, set-up included")
            sub.add_argument("--phases", default="0.3:1024:262144:0.4,0.65:4096:262144:0.4,1:8192:262144:0.4")
            sub.add_argument("--layers", type=int, default=8)
            sub.add_argument("--eval-tokens", type=int, default=98_304)
            sub.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
            sub.add_argument("--lr", type=float, default=3e-3)
            sub.add_argument("--workers", type=int, default=8)
            sub.add_argument("--prompts", type=int, default=36)
            sub.add_argument("--eval-every", type=float, default=60)
            sub.add_argument("--save-every", type=float, default=120)
            sub.add_argument("--line-every", type=float, default=10)
            sub.add_argument("--fresh", action="store_true", help="ignore a checkpoint")
            sub.add_argument("--weights", default=None, help="start from these weights and --state where no checkpoint is left")
            sub.add_argument("--state", default=None)
        if name == "deliver":
            sub.add_argument("--to", required=True)
    a = parser.parse_args()
    globals()[f"command_{a.command}"](a)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
