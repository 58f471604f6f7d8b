"""What is asked, of whom, when: from a spec and a seed to a schedule that is written before anything is sent."""
