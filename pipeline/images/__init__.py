"""From encoded bytes to crops: decoding within limits, resizing, cropping, normalising."""
