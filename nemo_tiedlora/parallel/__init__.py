"""How factors are cut over tensor ranks."""
