// Command snapmerge is the CSI driver for node-local volumes with instant
// restores, and its tools.
package main

func main() {}
