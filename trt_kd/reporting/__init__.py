"""Reporting: from evaluated and measured artifacts to tables, figures, gates and one page."""
