package engine

import (
	"strings"
	"testing"

	"conex/internal/compress"
)

func TestParseBuildOutput(t *testing.T) {
	for in, check := range map[string]func(o BuildOutput) bool{
		"out":                                 func(o BuildOutput) bool { return o.Type == OutputLocal && o.Dest == "out" },
		"dest=x":                              func(o BuildOutput) bool { return o.Type == OutputLocal && o.Dest == "dest=x" }, // as in buildx
		"-":                                   func(o BuildOutput) bool { return o.Type == OutputTar && o.Dest == "-" },
		"type=tar":                            func(o BuildOutput) bool { return o.Dest == "-" },
		"type=oci,dest=x.tar":                 func(o BuildOutput) bool { return o.Dest == "x.tar" && !o.Folder && !o.stored() },
		"type=oci,dest=x,tar=false":           func(o BuildOutput) bool { return o.Folder },
		"type=docker":                         func(o BuildOutput) bool { return o.stored() && o.Dest == "" },
		"type=docker,dest=-":                  func(o BuildOutput) bool { return !o.stored() },
		"type=image":                          func(o BuildOutput) bool { return o.stored() && !o.Push && o.Compression == compress.Gzip },
		"TYPE=image,Push=true":                func(o BuildOutput) bool { return o.Push },
		"type=image,push=":                    func(o BuildOutput) bool { return o.Push },
		"type=registry":                       func(o BuildOutput) bool { return o.Type == OutputImage && o.Push },
		"type=registry,push=false":            func(o BuildOutput) bool { return !o.Push },
		"type=image,push=true,store=false":    func(o BuildOutput) bool { return !o.stored() },
		`type=image,"name=a,b:1"`:             func(o BuildOutput) bool { return len(o.Names) == 2 && o.Names[1].Familiar() == "b:1" },
		"type=image,compression=uncompressed": func(o BuildOutput) bool { return o.Compression == compress.None && o.Packed },
		"type=image,compression=zstd,compression-level=9": func(o BuildOutput) bool { return o.level() == 9 },
		"type=image,compression-level=9,compression=zstd": func(o BuildOutput) bool { return o.level() == 9 && o.Compression == compress.Zstd },
		"type=image,oci-mediatypes=false":                 func(o BuildOutput) bool { return o.DockerTypes },
		"type=image,annotation.a.b=c=d":                   func(o BuildOutput) bool { return o.Annotations["a.b"] == "c=d" },
		"type=image,annotation-manifest[linux/amd64].x=y": func(o BuildOutput) bool { return o.Annotations["x"] == "y" },
		"type=image,annotation-manifest-descriptor.x=y":   func(o BuildOutput) bool { return o.DescriptorAnnotations["x"] == "y" },
		"type=local,dest=d,mode=delete,src=/a":            func(o BuildOutput) bool { return o.Mirror && o.Source == "/a" },
		"type=cacheonly":                                  func(o BuildOutput) bool { return !o.stored() && !o.isImage() },
	} {
		o, err := ParseBuildOutput(in)
		if err != nil || !check(o) {
			t.Errorf("%s gave %+v, %v", in, o, err)
		}
	}
	for in, want := range map[string]string{
		"type=local":                     "dest is required",
		"type=local,dest=-":              "cannot be stdout",
		"type=local,dest=x,name=y":       "no attribute name",
		"a=b,c=d":                        "type is required",
		"type=image,x":                   "invalid value x",
		"type=frob":                      `"frob" is not known`,
		"type=image,push=maybe":          "non-bool value",
		"type=image,name=UPPER":          "invalid name",
		"type=image,compression=estargz": "refused",
		"type=image,compression=lz4":     "unsupported compression type lz4",
		"type=image,compression-level=x": "non-integer value",
		"type=image,compression=gzip,compression-level=12":           "0 to 9",
		"type=image,registry.insecure=true":                          "config.toml",
		"type=image,annotation-index.a=b":                            "not supported for single platform",
		"type=image,annotation-frob.a=b":                             "unknown annotation type",
		"type=image,annotation.a=b,oci-mediatypes=false":             "cannot export annotations",
		"type=image,annotation-manifest[linux.a=b":                   "square brackets",
		"type=image,store=false":                                     "store=false",
		"type=oci,tar=false":                                         "dest is required",
		"type=tar,source-date-epoch=1":                               "SOURCE_DATE_EPOCH=1",
		"type=local,dest=x,src=":                                     "empty value",
		`type=image,"name=a`:                                         "no list of key=value",
		"type=image,push-by-digest=true":                             "needs push=true",
		"type=image,oci-mediatypes=false,compression=zstd,push=true": "conflicts",
	} {
		if _, err := ParseBuildOutput(in); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s gave the error %v, want one with %q", in, err, want)
		}
	}
	var o BuildOutput
	o.Type = OutputImage
	for _, a := range []string{"a=b", "manifest:c=d=e", "manifest,manifest-descriptor:f=g", "manifest[linux/arm64]:h="} {
		if err := o.AddAnnotation(a); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	if len(o.Annotations) != 4 || len(o.DescriptorAnnotations) != 1 || o.Annotations["c"] != "d=e" {
		t.Errorf("annotations are %v and %v", o.Annotations, o.DescriptorAnnotations)
	}
	for _, a := range []string{"a", ":a=b", "frob:a=b", "index:a=b", "manifest:=b"} {
		if err := o.AddAnnotation(a); err == nil {
			t.Errorf("annotation %s was taken", a)
		}
	}
}

func TestParseCache(t *testing.T) {
	for in, check := range map[string]func(c BuildCache) bool{
		"app:cache": func(c BuildCache) bool { return c.Type == CacheRegistry && c.Ref.Familiar() == "app:cache" },
		"type=registry,ref=r.example/app,mode=max":   func(c BuildCache) bool { return c.Max && c.Ref.Tag() == "latest" },
		"type=local,dest=d,tag=x,mounts=true":        func(c BuildCache) bool { return c.Dir == "d" && c.Tag == "x" && c.Mounts },
		"type=inline":                                func(c BuildCache) bool { return c.Type == CacheInline },
		"type=registry,ref=a,image-manifest=true":    func(c BuildCache) bool { return !c.IgnoreError },
		"type=registry,ref=a,compression=zstd":       func(c BuildCache) bool { return c.Compression == compress.Zstd && c.Level == 1 },
		"type=registry,ref=a,compression-level=9":    func(c BuildCache) bool { return c.Level == 9 },
		"ref=a,type=registry,ignore-error=true":      func(c BuildCache) bool { return c.IgnoreError },
		"type=local,dest=d,mode=min,mounts=false":    func(c BuildCache) bool { return !c.Max && !c.Mounts },
		"type=registry,ref=a,force-compression=true": func(c BuildCache) bool { return true },
	} {
		c, err := ParseCacheTo(in)
		if err != nil || !check(c) {
			t.Errorf("--cache-to %s gave %+v, %v", in, c, err)
		}
	}
	for in, want := range map[string]string{
		"type=gha":                         "type=gha is refused",
		"type=azblob,name=x":               "type=azblob is refused",
		"type=frob":                        "not known",
		"ref=x":                            "type required",
		"type=registry":                    "ref is required",
		"type=registry,ref=A":              "invalid cache reference",
		"type=local":                       "dest is required",
		"type=local,src=x":                 "no attribute src",
		"type=inline,mode=max":             "mode=max is not supported",
		"type=inline,compression=zstd":     "no attribute compression",
		"type=registry,ref=x,mode=all":     "min or max",
		"type=registry,ref=x,frob=1":       "no attribute frob",
		"type=local,dest=x,mounts=perhaps": "non-bool",
		"type=registry,ref=x@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855": "written to a tag",
	} {
		if _, err := ParseCacheTo(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("--cache-to %s gave the error %v, want one with %q", in, err, want)
		}
	}
	if c, err := ParseCacheFrom("type=local,src=d,digest=sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"); err != nil || c.Dir != "d" || c.Digest == "" {
		t.Errorf("%+v, %v", c, err)
	}
	for _, in := range []string{"type=inline", "type=local,dest=x", "type=registry,ref=x,mode=max"} {
		if _, err := ParseCacheFrom(in); err == nil {
			t.Errorf("--cache-from %s was taken", in)
		}
	}
}
