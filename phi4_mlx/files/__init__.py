"""Files on disk, checked before they are trusted and written whole or not at all."""
