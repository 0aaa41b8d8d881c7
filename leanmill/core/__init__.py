"""The seam everything meets at: sites, stages, techniques and the table of names.

Nothing is re-exported here so that reading a configuration never imports torch: import from
`leanmill.core.site`, `leanmill.core.technique` and so on.
"""
