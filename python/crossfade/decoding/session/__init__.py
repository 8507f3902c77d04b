"""Requests that join a running loop: one thread owns the models, any thread may ask."""

from .piece import Piece as Piece
from .request import Request as Request
from .scored import PromptScores as PromptScores
from .session import Session as Session
from .worker import Closed as Closed
from .worker import Full as Full
from .worker import SessionStats as SessionStats
