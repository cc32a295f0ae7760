"""What Inlay assumes of other libraries, one module per library.

Each assumption is a function that checks what it relies on when it is called. What is not recognised is refused with an
`InlayError`, or answered so that the caller takes a slower exact way. Modules here import their library only when one
of their functions needs it, and nothing of Inlay but `inlay.core.errors`.
"""
