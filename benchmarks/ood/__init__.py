"""Out-of-distribution detection: foreshock.surprise beside what others use; see docs/ood.md."""
