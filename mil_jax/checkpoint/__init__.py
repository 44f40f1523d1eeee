"""Reading and writing of models: released formats and training checkpoints."""
