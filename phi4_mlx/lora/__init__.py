"""LoRA adapters: small trained matrices beside frozen ones."""
