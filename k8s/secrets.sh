#!/usr/bin/env bash
# Prints the secrets that the manifests name, with new random values; nothing is kept.
#
#   k8s/secrets.sh local | kubectl create -f -
#   AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… k8s/secrets.sh gpu | kubectl create -f -
#
# A second argument is the namespace, by default gptj. `create` leaves existing secrets as they are.
set -euo pipefail

namespace=${2:-gptj}

case ${1-} in
  local)
    # The S3 server in the cluster accepts any keys.
    access=$(openssl rand -hex 8) secret=$(openssl rand -hex 20)
    ;;
  gpu)
    access=${AWS_ACCESS_KEY_ID:?is needed: keys of the bucket, see k8s/README.md}
    secret=${AWS_SECRET_ACCESS_KEY:?is needed: keys of the bucket, see k8s/README.md}
    ;;
  *)
    echo "usage: k8s/secrets.sh local|gpu [NAMESPACE]" >&2
    exit 2
    ;;
esac

cat << END
apiVersion: v1
kind: Secret
metadata: { name: s3, namespace: $namespace }
stringData: { AWS_ACCESS_KEY_ID: "$access", AWS_SECRET_ACCESS_KEY: "$secret" }
---
apiVersion: v1
kind: Secret
metadata: { name: redis, namespace: $namespace }
stringData: { password: "$(openssl rand -hex 32)" }
---
apiVersion: v1
kind: Secret
metadata: { name: api-keys, namespace: $namespace }
stringData: { GPTJ_API_KEYS: "$(openssl rand -hex 32)" }
END

if [ "$1" = local ]; then # in the overlay gpu, cert-manager makes the certificate
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
  openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN=gptj.localhost \
    -addext subjectAltName=DNS:gptj.localhost -keyout "$folder/key" -out "$folder/certificate" 2> "$folder/log" \
    || { cat "$folder/log" >&2; exit 1; }
  cat << END
---
apiVersion: v1
kind: Secret
metadata: { name: tls, namespace: $namespace }
type: kubernetes.io/tls
data: { tls.crt: "$(base64 -w0 "$folder/certificate")", tls.key: "$(base64 -w0 "$folder/key")" }
END
fi
