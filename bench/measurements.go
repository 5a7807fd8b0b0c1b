package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"
)

// measurement is one line of the table.
type measurement struct {
	name string
	// target is conex's aim in its unit; 0 is none.
	target float64
	// rounds bounds the rounds of slow ones; 0 is the flag's number.
	rounds int
	// memory: once returns megabytes instead of milliseconds.
	memory bool
	// unit is of what once returns, unless it is milliseconds or megabytes. Such values are differences, and have no ratio.
	unit string
	// build: engines that only build can do it.
	build bool
	// once does round i on the engine and returns what it took. What is not timed is undone before it returns.
	once func(b *bench, e *engine, i int) (float64, error)
}

// image is the base image's name, a busybox.
const image = "bench-base"

func measurements() []measurement {
	return slices.Concat([]measurement{
		{name: "version", target: 5, once: simple("version")},
		{name: "images", once: simple("images")},
		{name: "pull-100MB", rounds: 5, once: func(b *bench, e *engine, i int) (float64, error) {
			ref := e.registry + "/library/bench-pull:latest"
			args := []string{"pull", "-q", ref}
			if e.name == "podman" {
				args = []string{"pull", "-q", "--tls-verify=false", ref}
			}
			v, err := e.timed(args...)
			return then(v, err, func() error { return e.do("rmi", "-f", ref) })
		}},
	}, containerMeasurements(), networkMeasurements(), dnsMeasurements(), manyMeasurements(), runtimeMeasurements(), buildMeasurements(), imageMeasurements())
}

// then undoes a timed step that worked.
func then(v float64, err error, undo func() error) (float64, error) {
	if err != nil {
		_ = undo() // the step's own error tells more
		return 0, err
	}
	return v, undo()
}

// simple times one command that leaves nothing.
func simple(args ...string) func(*bench, *engine, int) (float64, error) {
	return func(b *bench, e *engine, i int) (float64, error) { return e.timed(args...) }
}

func (b *bench) context(name string) string { return filepath.Join(b.dir, "contexts", name) }

func writeDockerfile(dir, text string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644)
}

// prepare makes base image, contexts and registry, the same for all engines.
func (b *bench) prepare() error {
	base := filepath.Join(b.dir, "base.tar")
	if out, err := exec.Command("images/busybox", base).CombinedOutput(); err != nil {
		return fmt.Errorf("images/busybox: %w: %s", err, out)
	}
	layout := filepath.Join(b.dir, "layout")
	if err := writeLayout(layout, 100<<20); err != nil {
		return err
	}
	for _, e := range b.engines {
		if e.name == "buildkit" {
			if err := e.useBase(base); err != nil {
				return err
			}
			continue
		}
		if err := e.do("import", base, image); err != nil {
			return err
		}
		if err := e.serve(layout); err != nil {
			return err
		}
	}
	return nil
}

// writeLayout makes an OCI layout of one image, library/bench-pull, whose one layer has size bytes that gzip halves.
func writeLayout(dir string, size int) error {
	_, err := writeImage(dir, "docker.io/library/bench-pull:latest", func(w io.Writer) error {
		tw := tar.NewWriter(w)
		random := rand.NewChaCha8([32]byte{2})
		const fileSize = 1 << 20
		for i := range size / fileSize {
			data := make([]byte, fileSize)
			random.Read(data[:fileSize/2])
			if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("f%d", i), Size: fileSize, Mode: 0o644, Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0)}); err != nil {
				return err
			}
			if _, err := tw.Write(data); err != nil {
				return err
			}
		}
		return tw.Close()
	})
	return err
}

// writeImage makes an OCI layout of one image with one layer, whose tar write gives, and returns the manifest's digest.
func writeImage(dir, ref string, write func(io.Writer) error) (string, error) {
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return "", err
	}
	var packed bytes.Buffer
	plain := sha256.New()
	zw, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return "", err
	}
	if err := write(io.MultiWriter(zw, plain)); err != nil {
		return "", err
	}
	if err := zw.Close(); err != nil {
		return "", err
	}
	put := func(mediaType string, data []byte) (map[string]any, error) {
		sum := sha256.Sum256(data)
		name := hex.EncodeToString(sum[:])
		return map[string]any{"mediaType": mediaType, "digest": "sha256:" + name, "size": len(data)}, os.WriteFile(filepath.Join(blobs, name), data, 0o644)
	}
	layer, err := put("application/vnd.oci.image.layer.v1.tar+gzip", packed.Bytes())
	if err != nil {
		return "", err
	}
	config, err := json.Marshal(map[string]any{"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(plain.Sum(nil))}}})
	if err != nil {
		return "", err
	}
	configDesc, err := put("application/vnd.oci.image.config.v1+json", config)
	if err != nil {
		return "", err
	}
	manifest, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": configDesc, "layers": []any{layer}})
	if err != nil {
		return "", err
	}
	desc, err := put("application/vnd.oci.image.manifest.v1+json", manifest)
	if err != nil {
		return "", err
	}
	desc["annotations"] = map[string]string{"org.opencontainers.image.ref.name": ref}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{desc}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		return "", err
	}
	digest, _ := desc["digest"].(string)
	return digest, os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644)
}
