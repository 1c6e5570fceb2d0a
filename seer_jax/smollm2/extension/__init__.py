"""Evidence for long-context fine-tuning: YaRN with gates trained jointly, against gates after YaRN and dense attention."""
