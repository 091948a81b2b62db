"""The fault drill: a small real model, trained on real text, for faults to be tried on."""
