"""The protocol core: values in, values out. No I/O, no asyncio, no clock of its own."""
