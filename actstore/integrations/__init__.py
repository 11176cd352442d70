"""Optional bridges to other libraries."""
