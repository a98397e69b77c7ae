"""What adapters and bases look like from inside. Plain torch and matplotlib; nothing here knows NeMo."""
