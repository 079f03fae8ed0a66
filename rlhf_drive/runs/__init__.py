"""Reading runs back: what a run folder holds, its metrics as series, and curves. Imports no torch."""
