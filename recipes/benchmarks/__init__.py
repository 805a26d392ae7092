"""What is measured: speed, costs, policies, bytes on the wire, and what another engine accepts."""
