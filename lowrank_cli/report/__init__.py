"""What people see of finished work: tables, plots, comparisons."""
