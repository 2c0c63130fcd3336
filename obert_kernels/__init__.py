"""placeholder"""
from . import ops
