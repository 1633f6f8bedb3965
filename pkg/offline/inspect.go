package offline

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// Inspection is what a COW file says of itself. The JSON keys are those of the
// command; sizes are in bytes.
type Inspection struct {
	File      string  `json:"file"`
	FileBytes int64   `json:"file_bytes"`
	Version   string  `json:"version"` // such as "3.0"
	Label     *uint64 `json:"label,omitempty"`

	HeaderBytes uint16 `json:"header_bytes"`
	BlockBytes  uint32 `json:"block_bytes"`
	ClusterOps  uint32 `json:"cluster_ops"`  // slots of an op table of versions 1 and 2; 0: none
	MaxOpBytes  uint32 `json:"max_op_bytes"` // what the largest op of the file may write
	// Compression is the one algorithm of all packed ops, or "none".
	Compression string `json:"compression"`
	CRC         string `json:"identity_crc"` // of header and ops, hexadecimal; with FileBytes it names the file

	// Ops counts all ops by type, metadata included; Blocks the blocks that ops
	// of a type write.
	Ops    map[string]uint64 `json:"ops"`
	Blocks map[string]uint64 `json:"blocks"`

	Payload  Payload       `json:"payload"`
	Image    ImageSizes    `json:"image"`
	Labels   []LabelInfo   `json:"labels"`
	Sequence SequenceInfo  `json:"sequence"`
	Merge    MergeState    `json:"merge"`
	Scratch  *ScratchState `json:"scratch"` // nil: the file has none
}

// Payload is the data of replace and xor ops.
type Payload struct {
	StoredBytes   uint64 `json:"stored_bytes"`
	UnpackedBytes uint64 `json:"unpacked_bytes"`
}

// ImageSizes are the sizes that base and target need at least.
type ImageSizes struct {
	TargetBytes  uint64 `json:"target_bytes"`  // end of the highest block written
	SourceBytes  uint64 `json:"source_bytes"`  // end of what is read of the base
	WrittenBytes uint64 `json:"written_bytes"` // by all ops
}

// LabelInfo is a label that an unfinished file could be opened at.
type LabelInfo struct {
	Label uint64 `json:"label"`
	Ops   uint64 `json:"ops"` // before it in the file
}

// SequenceInfo describes the explicit merge order.
type SequenceInfo struct {
	Numbers uint64 `json:"numbers"` // of ops whose place it fixes; 0: the order follows from the ops
}

// MergeState is how far the file is merged according to itself.
type MergeState struct {
	NumMergeOps uint64  `json:"num_merge_ops"`
	Ops         uint64  `json:"ops"` // of the merge list
	Percent     float64 `json:"percent"`
}

// ScratchState describes the scratch space.
type ScratchState struct {
	Bytes    uint32 `json:"bytes"`
	Capacity int    `json:"capacity_blocks"`
	State    string `json:"state"` // "idle", "in progress" or "done"
	// Blocks is how many blocks of a window it holds; Valid tells whether they
	// are those of the ops merged next, which must then be redone from here.
	Blocks int  `json:"blocks"`
	Valid  bool `json:"valid"`
}

// OpInfo is one op in the order of the file.
type OpInfo struct {
	Offset int64  `json:"offset"` // of the op in the file
	Type   string `json:"type"`
	// NewBlock and Source are as stored; see the COW format for their meaning
	// by type.
	NewBlock    uint64 `json:"new_block"`
	Blocks      int    `json:"blocks"` // written; 0 for metadata
	Source      uint64 `json:"source"`
	DataOffset  int64  `json:"data_offset"`
	DataLength  int    `json:"data_length"` // bytes stored
	Compression string `json:"compression"`
}

// InspectOptions say what to inspect.
type InspectOptions struct {
	COW   string
	Label *uint64
	FS    blockio.FS
}

// Inspect checks a COW file and describes it. No data of ops is read, and beside
// the list of ops that checking them all together takes (at most 24 bytes an op)
// memory does not grow.
func Inspect(o InspectOptions) (s *Inspection, err error) {
	err = o.with(func(f blockio.File, file *cow.File) error {
		s, err = inspect(o, file, f.Size())
		return withLabel(err, f, file, o.Label)
	})
	return s, err
}

// WalkOps calls fn for every op in the order of the file, each checked by itself.
func WalkOps(o InspectOptions, fn func(OpInfo) error) error {
	return o.with(func(_ blockio.File, file *cow.File) error {
		return file.Walk(func(r cow.RawOp) error {
			return fn(OpInfo{Offset: r.Offset, Type: r.Type.String(), NewBlock: r.NewBlock, Blocks: r.Blocks, Source: r.Source,
				DataOffset: r.DataOffset, DataLength: r.DataLength, Compression: r.Compression.String()})
		})
	})
}

// with opens the file for fn.
func (o InspectOptions) with(fn func(blockio.File, *cow.File) error) error {
	if o.FS == nil {
		o.FS = blockio.OS()
	}
	f, err := o.FS.Open(o.COW, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	file, err := cow.Open(f, f.Size(), cow.OpenOptions{Label: o.Label})
	if err == nil {
		err = fn(f, file)
	}
	return inFile(o.COW, err)
}

func inspect(o InspectOptions, file *cow.File, size int64) (*Inspection, error) {
	t, err := file.Load()
	if err != nil {
		return nil, err
	}
	h := file.Header()
	s := &Inspection{
		File: o.COW, FileBytes: size, Version: fmt.Sprintf("%d.%d", h.Major, h.Minor), Label: o.Label,
		HeaderBytes: h.HeaderSize, BlockBytes: h.BlockSize, ClusterOps: h.ClusterOps, MaxOpBytes: cow.BlockSize,
		Compression: h.Compression.String(), CRC: fmt.Sprintf("%08x", t.Identity().CRC),
		Ops: map[string]uint64{}, Blocks: map[string]uint64{}, Labels: []LabelInfo{},
		Sequence: SequenceInfo{Numbers: h.SequenceCount},
	}
	if h.Major == 3 {
		s.MaxOpBytes = h.MaxCompressionSize
	}
	if err := file.Walk(s.count); err != nil {
		return nil, err
	}
	if err := s.addLabels(file); err != nil {
		return nil, err
	}
	s.Image.TargetBytes, s.Image.SourceBytes = t.Bounds()
	s.Image.TargetBytes *= bs
	s.Image.WrittenBytes = t.TargetBlocks() * bs
	if err := s.addMerge(t, h.NumMergeOps); err != nil {
		return nil, err
	}
	return s, s.addScratch(file, t, h)
}

func (s *Inspection) count(r cow.RawOp) error {
	name := r.Type.String()
	s.Ops[name]++
	switch r.Type {
	case cow.Replace, cow.Xor:
		s.Payload.StoredBytes += uint64(r.DataLength)
		s.Payload.UnpackedBytes += uint64(r.Blocks) * bs
		// In versions 1 and 2 only the ops tell; the reader has checked that they
		// agree.
		if r.Compression != cow.None {
			s.Compression = r.Compression.String()
		}
	case cow.Sequence:
		s.Sequence.Numbers += uint64(r.DataLength / 4)
	}
	if r.Blocks > 0 {
		s.Blocks[name] += uint64(r.Blocks)
	}
	return nil
}

func (s *Inspection) addLabels(file *cow.File) error {
	labels, err := readLabels(file, s.Label)
	for _, l := range labels {
		s.Labels = append(s.Labels, LabelInfo(l))
	}
	return err
}

// readLabels reads the labels of a file that ends at the label at, if given.
func readLabels(file *cow.File, at *uint64) ([]cow.ResumePoint, error) {
	labels, err := file.Labels()
	for i, l := range labels {
		if at != nil && l.Label == *at {
			return labels[:i+1], err
		}
	}
	return labels, err
}

func (s *Inspection) addMerge(t *cow.Table, merged uint64) error {
	bytes := uint64(0)
	for pos := range merged {
		op, err := t.At(pos)
		if err != nil {
			return err
		}
		bytes += uint64(op.Blocks) * bs
	}
	s.Merge = MergeState{NumMergeOps: merged, Ops: t.Len(), Percent: 100}
	if total := s.Image.WrittenBytes; total > 0 {
		s.Merge.Percent = math.Round(float64(bytes)/float64(total)*1000) / 10
	}
	return nil
}

func (s *Inspection) addScratch(file *cow.File, t *cow.Table, h cow.Header) error {
	space, err := file.Scratch()
	if err != nil || space == nil {
		return err
	}
	window, err := space.Window(t, h.NumMergeOps)
	if err != nil {
		return err
	}
	s.Scratch = &ScratchState{
		Bytes: h.BufferSize, Capacity: space.Capacity(), State: scratchStates[space.State],
		Blocks: len(space.Entries), Valid: window > 0,
	}
	return nil
}

var scratchStates = [...]string{cow.ScratchIdle: "idle", cow.ScratchInProgress: "in progress", cow.ScratchDone: "done"}

// labelTries bounds how many labels are tried, each of which reads the ops again.
const labelTries = 16

// withLabel adds to what is wrong with a file the last label that it could be
// opened at instead: what is bad may lie before the last one of all.
func withLabel(err error, f blockio.File, file *cow.File, asked *uint64) error {
	var bad *cow.FormatError
	if asked != nil || !errors.As(err, &bad) {
		return err
	}
	labels, _ := file.Labels() // the error is err
	for _, l := range slices.Backward(labels[max(len(labels)-labelTries, 0):]) {
		if opensAt(f, l.Label) {
			return fmt.Errorf("%w (its last good label is %d; --label opens it there)", err, l.Label)
		}
	}
	return err
}

func opensAt(f blockio.File, label uint64) bool {
	file, err := cow.Open(f, f.Size(), cow.OpenOptions{Label: &label})
	if err == nil {
		_, err = file.Load()
	}
	return err == nil
}
