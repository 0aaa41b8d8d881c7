"""Adapters: inside weights, beside layers through PEFT, and methods of our own that PEFT loads after this import."""

from leanmill.peft_ext.registration import register_with_peft


register_with_peft()
