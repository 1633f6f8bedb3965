// Package image packs a directory as a container image of one layer.
//
// The format is the archive that `docker save` writes: a tar with the layer (a
// tar itself), the image's configuration, and manifest.json, which names both.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// Config is how the image's program is run.
type Config struct {
	Entrypoint []string
	Cmd        []string // arguments of the entry point that a pod can replace
	Env        []string
}

// Save packs the tree at root as an image with the name and writes the archive to
// the file. All files belong to root.
func Save(file, root, name string, config Config) error {
	err := save(file, root, name, config)
	if err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	return nil
}

func save(file, root, name string, config Config) (err error) {
	layer, err := os.CreateTemp(filepath.Dir(file), ".layer-")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	hash := sha256.New()
	if err := writeTree(io.MultiWriter(layer, hash), root); err != nil {
		return err
	}
	sum := hex.EncodeToString(hash.Sum(nil))
	described, err := json.Marshal(map[string]any{
		"os": "linux", "architecture": runtime.GOARCH, "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + sum}},
	})
	if err != nil {
		return err
	}
	id := sha256.Sum256(described)
	configName, layerName := hex.EncodeToString(id[:])+".json", sum+".tar"
	manifest, err := json.Marshal([]any{map[string]any{
		"Config": configName, "RepoTags": []string{name}, "Layers": []string{layerName},
	}})
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	size, err := layer.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = layer.Seek(0, io.SeekStart)
	}
	if err != nil {
		return err
	}
	w := tar.NewWriter(out)
	for _, part := range []struct {
		name string
		size int64
		from io.Reader
	}{
		{configName, int64(len(described)), bytes.NewReader(described)},
		{layerName, size, layer},
		{"manifest.json", int64(len(manifest)), bytes.NewReader(manifest)},
	} {
		if err := w.WriteHeader(&tar.Header{Name: part.name, Mode: 0o644, Size: part.size}); err != nil {
			return err
		}
		if _, err := io.Copy(w, part.from); err != nil {
			return err
		}
	}
	return w.Close()
}

// writeTree writes directories, regular files and symbolic links as a tar.
func writeTree(to io.Writer, root string) error {
	w := tar.NewWriter(to)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		return writeEntry(w, root, path, d)
	})
	if err != nil {
		return err
	}
	return w.Close()
}

func writeEntry(w *tar.Writer, root, path string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	if h.Name, err = filepath.Rel(root, path); err != nil {
		return err
	}
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	if err := w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}
