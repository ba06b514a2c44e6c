"""Files as every room uses them: regular ones only, whole or not there, locked, trusted, where caches lie."""
