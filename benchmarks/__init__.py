"""Speed, memory and error of one model under different engines, each measured in a process of its own."""
