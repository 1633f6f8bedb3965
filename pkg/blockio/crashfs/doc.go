// Package crashfs is a file system in memory, for tests, that can lose power.
// It implements blockio.FS and makes, at any moment, independent file systems
// as a crash might have left them.
//
// # What survives
//
//	file content   A file has a durable content and an ordered list of unsynced
//	               effects: writes, truncations, zeroed and allocated ranges,
//	               attribute changes. File.Flush makes that file's effects
//	               durable, and only that. Of unsynced effects any subset may
//	               survive, in any order; a write or zeroed range may survive in
//	               part, by sectors of 512 bytes counted from the start of the
//	               file.
//	names          Creations, renames, links and removals become durable by
//	               SyncDir of their directory. Unsynced ones survive as a prefix
//	               of their order in the directory, as under a metadata journal.
//	               A rename between two directories survives in both or neither,
//	               and syncing one of them syncs what comes before it in the
//	               other.
//	files          A file whose name did not survive is gone, flushed or not.
//	locks          Belong to open files, so nothing is locked after a crash.
//
// A process that is killed loses nothing of this: see FS.Kill.
//
// # Difference from a real disk
//
// Flush and SyncDir are exact here: nothing becomes durable before or without
// them unless the crash image says so. Symbolic links don't exist.
package crashfs
