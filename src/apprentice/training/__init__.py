"""Pretraining, SFT and RL: trainers, rollouts, rewards, advantages, the ranks they run in."""
