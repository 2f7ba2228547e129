"""DeepEmbed tables that lie away from the network, while it trains and while it runs."""
