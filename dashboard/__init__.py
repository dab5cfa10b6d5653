"""The Streamlit dashboard: the two panels side by side."""
