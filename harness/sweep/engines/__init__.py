"""What carries out the jobs of a sweep: one file an engine, chosen by `launcher=`; what they share is in `base.py`."""
