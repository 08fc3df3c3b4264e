"""What a run is: frozen dataclasses, a strict loader, one function per rule. Imports no torch."""
