// Package handover puts the devices of a transport under a device-mapper device with
// a linear table, and swaps that table under I/O: to the base, when a volume has
// nothing but its base, and back to the transport's device before it gets a layer
// again. While the base is in the table no request passes through a process: the
// volume is as fast as its base, and nobody's end disturbs it.
//
// # Steps
//
// A swap loads the other table, suspends the device (new requests wait, those in
// flight end), asks the volume whether it is still right, and resumes. What a process
// that is killed leaves:
//
//	before a table is loaded   the table that was
//	loaded                     the table that was; Adopt clears the other one
//	suspended                  requests wait until Adopt has cleared the other one and resumed
//	resumed                    the other table
//
// So the table in service is always one of the two, and Adopt finds out which. What
// the volume records meanwhile is told in pkg/volume, at Record.Native.
//
// # The base
//
// It is reached by a loop device (direct I/O, block size of the transport's device)
// that the kernel takes away when no table has it any more. Its lo_file_name is the
// name of the device-mapper device, so that it can be told from others. There a
// discard punches a hole, so that zeros are read ever after; a base that is a block
// device need not do that, and is not handed over.
//
// # Names
//
// Devices are called snapmerge-native-TAG. Which tag a volume's device has is kept in
// a directory of transport.Records.
package handover
