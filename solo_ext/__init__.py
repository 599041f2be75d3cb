"""The methods of ``plugins`` inside solo-learn: its data, training, checkpoints and evaluation, our objectives."""
