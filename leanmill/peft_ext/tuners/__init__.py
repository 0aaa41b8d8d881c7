"""Adapter methods that PEFT has not, as PEFT methods: any program that imports `leanmill.peft_ext` loads them."""

import peft  # noqa: F401 (registers the modules here; one that is imported first would be registered half made)
