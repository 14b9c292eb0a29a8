//! Placeholder until the scheduler's golden tests land.
