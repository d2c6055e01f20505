"""What one would write without this project, as plain programs to be measured against."""
