"""The train step and the loop around it.

To read: `train_step.py` is the step, `micro_batches.py` how it takes a batch in parts, `state.py`
and `optim.py` what it changes, `train.py` the loop over steps, `start.py` how it begins, `feed.py`
where its batches come from, `score.py` and `progress.py` what it reports.
"""
