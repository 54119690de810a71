"""Files on the disk: checked before they are trusted, written whole or not at all."""
