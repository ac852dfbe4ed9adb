"""The parts of the fetcher: connections, addresses, robots.txt, budgets of hosts and of memory."""
