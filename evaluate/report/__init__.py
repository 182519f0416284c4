"""The report: tables, pictures and plots on one page."""
