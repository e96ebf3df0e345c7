"""Checkpoints: written during training, committed by rename, found, verified, loaded into any layout, grown."""
