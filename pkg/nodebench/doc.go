// Package nodebench measures a node plugin and its keeper as they run in a
// cluster: processes of their own that are spoken to by CSI, with volumes that are
// staged and merged while something else uses them.
package nodebench

const mib = 1 << 20
