"""Images and sound as the model reads them: files, pixels, log-mel features and the tokens that they cost."""
