"""Modules for operations that architectures need beside PyTorch's, under the original's names.

None is needed here: functions and graphs of any kind work.
"""
