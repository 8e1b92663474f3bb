#!/bin/sh
# Make a virtual environment self-contained: with its interpreter, the standard library, and the shared libraries down
# to the C library and its loader, each found relative to it. It then runs on any Linux of the same architecture that
# has /bin/sh for the commands, whatever Python or C library is there; it is not to be moved to another path.
set -eu
venv=$1
python=$("$venv/bin/python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
version=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_python_version())')
stdlib=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
loader=$(patchelf --print-interpreter "$python")

rm -f "$venv"/bin/python* "$venv/pyvenv.cfg"
cp "$python" "$venv/bin/python3"
ln -s python3 "$venv/bin/python"
site=$venv/lib/python$version/site-packages
mv "$site" "$venv/site-packages"
cp -R "$stdlib/." "$venv/lib/python$version"
mv "$venv/site-packages" "$site"
(cd "$venv/lib/python$version" && rm -rf test tests idlelib tkinter lib2to3 turtledemo ensurepip distutils pydoc_data \
  config-* __pycache__ sitecustomize.py dist-packages EXTERNALLY-MANAGED)

# Which libraries: what the loader finds for the interpreter and all extension modules, and what the C library opens
# by itself: to look up users and hosts, and to end a thread (pthread_exit(3)), for want of which it aborts.
mkdir "$venv/lib/native"
find "$venv" -name '*.so' -o -path "$venv/bin/python3" | while read -r file; do
  ldd "$file" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// {print $3}'
done | sort -u > /tmp/libraries
for name in libnss_files.so.2 libnss_dns.so.2 libresolv.so.2 libgcc_s.so.1; do
  find "$(dirname "$(ldd "$python" | awk '$1 == "libc.so.6" {print $3}')")" -name "$name" >> /tmp/libraries
done
sort -u /tmp/libraries | while read -r library; do cp -L "$library" "$venv/lib/native/"; done
cp -L "$loader" "$venv/lib/native/loader"

find "$venv" -name '*.so' | while read -r file; do patchelf --force-rpath --set-rpath "$venv/lib/native" "$file"; done
find "$venv/lib/native" -name '*.so*' | while read -r file; do
  patchelf --force-rpath --set-rpath "$venv/lib/native" "$file"
done
patchelf --force-rpath --set-rpath "$venv/lib/native" --set-interpreter "$venv/lib/native/loader" "$venv/bin/python3"

# Debian's interpreter looks for packages in dist-packages; ours are where pip has put them.
ln -s site-packages "$venv/lib/python$version/dist-packages"
for script in "$venv"/bin/*; do
  [ -L "$script" ] || [ "$script" = "$venv/bin/python3" ] || sed -i "1s|^#!.*|#!$venv/bin/python3 -I|" "$script"
done
"$venv/bin/python3" -I -c "import ssl, sys; assert sys.prefix == '$venv', sys.prefix"
test -s "$venv/lib/native/libgcc_s.so.1"
"$venv/bin/twistd" --help | grep -q sandboxd
