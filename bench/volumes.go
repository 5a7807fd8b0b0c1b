package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// volumeFiles is how many files the image bench-files has below /files.
const volumeFiles = 10_000

// volumeMeasurements are about volumes. The copy of first use is to be compared with the line below it: what cp -a takes for the same files,
// in the folder of each engine.
func volumeMeasurements() []measurement {
	return []measurement{
		{name: "volume-create", target: 5, once: func(b *bench, e *engine, i int) (float64, error) {
			v, err := e.timed("volume", "create", "bench-volume")
			return then(v, err, func() error { return e.do("volume", "rm", "bench-volume") })
		}},
		{name: "volume-first-use", rounds: 5, once: func(b *bench, e *engine, i int) (float64, error) {
			if i == 0 {
				file, err := b.manyFilesImage()
				if err != nil {
					return 0, err
				}
				if err := e.do("import", file, "bench-files"); err != nil {
					return 0, err
				}
			}
			v, err := e.timed("run", "--rm", "--network", "none", "-v", "bench-volume:/files", "bench-files", "true")
			return then(v, err, func() error {
				err := e.do("volume", "rm", "bench-volume")
				if i == min(b.rounds, 5) {
					err = errors.Join(err, e.do("rmi", "-f", "bench-files"))
				}
				return err
			})
		}},
		{name: "volume-cp-a", rounds: 5, once: func(b *bench, e *engine, i int) (float64, error) {
			src := filepath.Join(b.dir, "cp-source")
			if _, err := os.Stat(src); err != nil {
				file, err := b.manyFilesImage()
				if err != nil {
					return 0, err
				}
				if err := os.Mkdir(src, 0o755); err != nil {
					return 0, err
				}
				if out, err := exec.Command("tar", "-C", src, "-xf", file, "files").CombinedOutput(); err != nil {
					return 0, fmt.Errorf("%w: %s", err, out)
				}
			}
			dst := filepath.Join(b.dir, "cp-target")
			began := time.Now()
			out, err := exec.Command("cp", "-a", filepath.Join(src, "files"), dst).CombinedOutput()
			v := float64(time.Since(began)) / 1e6
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return then(v, err, func() error { return os.RemoveAll(dst) })
		}},
	}
}

// manyFilesImage makes the tar of the base image with volumeFiles files below /files.
func (b *bench) manyFilesImage() (path string, err error) {
	path = filepath.Join(b.dir, "files.tar")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	base, err := os.Open(filepath.Join(b.dir, "base.tar"))
	if err != nil {
		return "", err
	}
	defer base.Close()
	f, err := os.Create(path + ".part")
	if err != nil {
		return "", err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for r := tar.NewReader(base); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = w.WriteHeader(h)
		}
		if err == nil {
			_, err = io.Copy(w, r)
		}
		if err != nil {
			return "", err
		}
	}
	when := time.Unix(1700000000, 0)
	for i := range volumeFiles {
		dir := fmt.Sprintf("files/d%d", i/100)
		if i%100 == 0 {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: when}); err != nil {
				return "", err
			}
		}
		text := strings.Repeat("0123456789abcdef", i%512)
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/f%d", dir, i), Mode: 0o644, Uid: i % 3, ModTime: when, Size: int64(len(text))})
		if err == nil {
			_, err = io.WriteString(w, text)
		}
		if err != nil {
			return "", err
		}
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	return path, os.Rename(path+".part", path)
}
