"""The methods, one file each: science only. Methods never import each other."""
