//! Frames between agents.
