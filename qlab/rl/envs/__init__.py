"""Environments as pure functions; see qlab.rl.envs.env for the contract."""
