"""A study of gates: variants distilled by one recipe and scored on the same windows, with what each costs."""
